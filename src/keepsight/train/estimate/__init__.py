"""What a run would need, estimated from shapes before a weight is read."""
