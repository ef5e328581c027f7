"""The one loop: read row tiles, let the method decide, write the merged rows at their place."""
