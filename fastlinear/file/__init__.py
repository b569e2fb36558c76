"""Saving and loading: one safetensors file, checked before anything changes."""
