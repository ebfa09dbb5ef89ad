"""What Scopegate is compared with, each as a file of its own, tuned for speed; and the backend behind all."""
