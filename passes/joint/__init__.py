"""Passes on AOTAutograd's joint graph of forward and backward: what a backward keeps."""
