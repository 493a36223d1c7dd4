"""Long proofs and benchmarks; results are committed under results/ with machine and date."""
