"""What is guessed for each request, and how many guesses are worth verifying. The same for both model runners."""
