"""Plain torch: the truth in float64 and the backend of last resort. Imports torch only."""
