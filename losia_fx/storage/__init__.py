"""Files that are whole or not there, and that prove what they hold."""
