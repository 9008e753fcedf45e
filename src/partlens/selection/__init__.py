"""Relevant features of each class: responses of every layer and the μ-lasso over them."""
