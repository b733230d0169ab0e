"""What a base calls its modules and tensors, and what others call them."""
