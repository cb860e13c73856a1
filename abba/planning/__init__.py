"""What a recipe needs on a cluster, before a GPU is booked: memory, traffic and time, by arithmetic alone."""
