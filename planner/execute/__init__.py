"""What a plan says, done: meshes, splits, sharding and recompute on plain modules, and a dry run of them."""
