"""One signature and one plain-torch reference per operation; the only place that dispatches."""
