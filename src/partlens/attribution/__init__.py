"""What a person looks at: backward pictures, average pictures of a model, explanations of one prediction."""
