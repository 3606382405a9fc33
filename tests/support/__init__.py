"""What several tests share: problems for the ops, tiny models, engines, servers, a browser."""
