"""The Ray Serve application: versioned models behind HTTP."""
