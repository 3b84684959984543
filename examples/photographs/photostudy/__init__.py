"""Losses compared on Flickr8k, by a registered plan: retrieval, and agreement with people."""
