"""What changes while training: the subnets' state, whose step it is, and the controller that moves them."""
