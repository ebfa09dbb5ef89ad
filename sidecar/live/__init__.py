"""The configuration and the policies of one moment, and how a reload replaces them."""
