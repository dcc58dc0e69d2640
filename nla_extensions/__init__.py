"""What stands beside §11 and is never needed by it."""
