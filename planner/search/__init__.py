"""The best plan and its proof: candidates, the split of every operator, the stages, the degrees."""
