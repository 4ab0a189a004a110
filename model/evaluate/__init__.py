"""Metrics of videos behind one interface: features of frozen networks in, scores with intervals out."""
