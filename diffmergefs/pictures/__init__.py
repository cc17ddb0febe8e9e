"""Maps and histograms as pictures and as text cells."""
