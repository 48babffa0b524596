"""Cameras and keys: what a user gives, in the dialects of the field, to camera poses, labels and spans of latents.

Camera axes are OpenCV's: x right, y down, z forward. c2w is world from camera, w2c its inverse, which networks take.
All arithmetic is float64. Which dialect a string is in is named by the user, never guessed: the same string means
different motions in different projects.
"""
