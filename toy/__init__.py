"""What the laptop demo invents: pictures, warm-up SFT data, a model with random weights."""
