"""Arrays to every client and back."""
