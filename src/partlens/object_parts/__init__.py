"""Parts of filters, and what each of them contributes to a prediction."""
