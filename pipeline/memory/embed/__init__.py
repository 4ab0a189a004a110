"""From clips to documents: pictures, CLIP vectors, staged files."""
