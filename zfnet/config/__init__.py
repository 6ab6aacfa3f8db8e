"""Configs: their types, reading and checking, instantiation of classes, and trust."""
