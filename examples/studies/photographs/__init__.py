"""Losses compared on Flickr8k, by registered plans: retrieval, and agreement with people."""
