"""The web application: routes, admission, endpoints, and the answers to errors."""
