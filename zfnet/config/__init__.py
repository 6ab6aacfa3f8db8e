"""What a user can say: types, overrides, instantiation and trust."""
