"""What moves between coordinator and devices: how fast, with how much memory."""
