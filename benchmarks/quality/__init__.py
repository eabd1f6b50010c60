"""What each method is worth: a grid of simulated runs, their statistics, and a page of results."""
