"""What the scripts share; they find it because it lies beside them."""
