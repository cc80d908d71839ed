"""What is asked: a call checked, brought into one form, and described."""
