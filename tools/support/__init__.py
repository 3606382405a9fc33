"""What the tools and the tests share: tiny models, a server in a process of its own."""
