"""Racing connection attempts, which only host names with several addresses need."""
