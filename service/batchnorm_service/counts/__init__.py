"""What was answered, counted for each model and process, and summed over processes."""
