"""The `cellplane` command; each verb imports what it needs when it is called."""
