"""Teacher in, student out: the data-free distillation engine. It never prints and never sees a labelled image."""
