"""`jaxablate sample`: what the finished runs of a study write, arms side by side."""
