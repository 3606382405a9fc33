"""What several tests share: problems for the ops, back ends, engines, a browser."""
