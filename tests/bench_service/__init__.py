"""The service beside other servers, over real sockets; `make bench-service`."""
