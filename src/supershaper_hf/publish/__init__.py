"""Write everything a repository on the Hugging Face Hub needs into a folder, and upload it."""
