"""Records a run. Energy is computed elsewhere."""
