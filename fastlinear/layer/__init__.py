"""One layer: how it packs, plans, answers, differentiates and freezes."""
