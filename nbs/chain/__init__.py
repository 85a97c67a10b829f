"The chain notebooks, packaged so that an installed s3ft_nb can run them."
