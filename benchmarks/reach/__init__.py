"""How far plans reach: every image, backbone and text family of the installed ``transformers``, small and random."""
