"""Stand-ins for the libraries behind the adapters: their signatures and what they are documented to do, on the CPU."""
