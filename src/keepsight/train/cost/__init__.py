"""What training costs: counted from shapes before a run, accounted for after it."""
