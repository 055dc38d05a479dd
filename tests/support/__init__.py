"""What the tests of the server and of the engine share."""
