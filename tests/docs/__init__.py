"""What README.md and docs/ say is true, and every command in them works."""
