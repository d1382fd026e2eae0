"""The Dynamo backend, and the way of those who name it by a string alone."""
